"""F2: the words and signs that may stand after a number: scales, currencies, percent, units. The lists are closed.

A word that is in none of them makes no quantity: "5 squared" and "5 is incorrect" are texts.
"""

from fractions import Fraction

#: Names in any case → factor.
SCALE_WORDS = {
    **dict.fromkeys(("hundred", "hundreds"), Fraction(100)),
    **dict.fromkeys(("k", "thousand", "thousands"), Fraction(10**3)),
    **dict.fromkeys(("mn", "mln", "mio", "million", "millions"), Fraction(10**6)),
    **dict.fromkeys(("bn", "bln", "billion", "billions"), Fraction(10**9)),
    **dict.fromkeys(("tn", "trn", "trillion", "trillions"), Fraction(10**12)),
    **dict.fromkeys(("lakh", "lakhs"), Fraction(10**5)),
    **dict.fromkeys(("crore", "crores"), Fraction(10**7)),
    **dict.fromkeys(("dozen", "dozens"), Fraction(12)),
}
#: As capitals, and in any case after a currency's sign ("$5m"); "5m" alone is 5 metres.
SCALE_LETTERS = {"M": Fraction(10**6), "MM": Fraction(10**6), "B": Fraction(10**9), "T": Fraction(10**12)}

#: Sign or code → the currency's one name. These stand before a number or after it.
CURRENCY_SIGNS = {
    **dict.fromkeys(("us$", "usd", "u.s. $", "$"), "$"),
    **dict.fromkeys(("a$", "au$", "aud"), "a$"),
    **dict.fromkeys(("c$", "ca$", "cad"), "c$"),
    **dict.fromkeys(("nz$", "nzd"), "nz$"),
    **dict.fromkeys(("hk$", "hkd"), "hk$"),
    **dict.fromkeys(("s$", "sgd"), "s$"),
    **dict.fromkeys(("r$", "brl"), "r$"),
    **dict.fromkeys(("eur", "€"), "€"),
    **dict.fromkeys(("gbp", "£"), "£"),
    **dict.fromkeys(("inr", "rs", "rs.", "₹"), "₹"),
    **dict.fromkeys(("jpy", "¥"), "¥"),
    **dict.fromkeys(("cny", "rmb"), "cny"),
    **dict.fromkeys(("krw", "₩"), "₩"),
    "chf": "chf",
    "₽": "₽",
    "₺": "₺",
    "₪": "₪",
    "¢": "¢",
}
#: Words that stand after a number alone.
CURRENCY_WORDS = {
    **dict.fromkeys(("dollar", "dollars", "us dollars", "u.s. dollars", "bucks"), "$"),
    **dict.fromkeys(("australian dollars",), "a$"),
    **dict.fromkeys(("canadian dollars",), "c$"),
    **dict.fromkeys(("euro", "euros"), "€"),
    **dict.fromkeys(("pounds sterling",), "£"),
    **dict.fromkeys(("rupee", "rupees"), "₹"),
    **dict.fromkeys(("yen",), "¥"),
    **dict.fromkeys(("yuan", "renminbi"), "cny"),
    **dict.fromkeys(("won",), "₩"),
    **dict.fromkeys(("francs", "swiss francs"), "chf"),
    **dict.fromkeys(("cent", "cents"), "¢"),
}
#: Name → how much of one percent it is. A ratio is not among them: 9.3 % is not 0.093.
PERCENTS = {
    **dict.fromkeys(("%", "percent", "per cent", "pct", "percentage point", "percentage points"), Fraction(1)),
    **dict.fromkeys(("‰", "per mille", "permille"), Fraction(1, 10)),
    **dict.fromkeys(("bp", "bps", "basis point", "basis points"), Fraction(1, 100)),
}
_DEGREES = {
    **dict.fromkeys(("°", "degree", "degrees"), "°"),
    **dict.fromkeys(("°c", "degrees celsius", "degree celsius", "celsius"), "°c"),
    **dict.fromkeys(("°f", "degrees fahrenheit", "degree fahrenheit", "fahrenheit"), "°f"),
}
# One name a line: it and the others that mean the same. The first is how it is written in a key.
_MEASURES = """
mm millimeter millimeters millimetre millimetres
cm centimeter centimeters centimetre centimetres
m meter meters metre metres
km kms kilometer kilometers kilometre kilometres
in inch inches
ft foot feet
yd yds yard yards
mile mi miles
mg milligram milligrams
g gram grams gm gms
kg kgs kilo kilos kilogram kilograms kilogramme kilogrammes
t ton tons tonne tonnes
oz ounce ounces
lb lbs pound pounds
ml milliliter milliliters millilitre millilitres
cl centiliter centiliters centilitre centilitres
l liter liters litre litres
gallon gal gallons
quart qt quarts
pint pt pints
cup cups
tablespoon tbsp tablespoons
teaspoon tsp teaspoons
acre acres
hectare ha hectares
ms millisecond milliseconds
sec secs second seconds
min mins minute minutes
h hr hrs hour hours
day days
week wk wks weeks
month mo mos months
year yr yrs years
decade decades
century centuries
mph
kph kmh
watt w watts
kw kilowatt kilowatts
mw megawatt megawatts
kwh
volt v volts
amp amps ampere amperes
ohm ohms
joule j joules
newton n newtons
pa pascal pascals
hz hertz
mol moles
calorie cal calories
kcal kcals
kb kilobyte kilobytes
mb megabyte megabytes
gb gigabyte gigabytes
tb terabyte terabytes
bit bits
byte bytes
radian rad radians
"""
#: What is counted, in the singular; its plural is read too.
_COUNTED = """
adult album animal ant apartment apple artwork article attendee baby bag bale ball balloon banana bar barrel basket
basketball bead bean bee berry bill bird block blueberry boat bolt bone book bottle bouquet bowl box boy bracelet brick
brownie bucket bug building bus bushel butterfly button cake calf can candle candy car card carrot carton case cat
chair character chicken child chip chocolate class coin color colour computer container cookie course cow crab crate
crayon cup cupcake customer daisy deer desk dime dish dog doll donut doughnut dress duck earring egg elephant email
employee envelope episode eraser error event fish fishes floor flower follower friend frog fruit game gift girl glass
goal goat goose group guest gumball guppy hat hen hole home horse house individual insect item jar jellybean job jump
kid kitten lamp lap leaf leg lemon letter lie light line lion loaf log lollipop man marble mark marker match meal member
message mile minion mouse movie muffin mushroom necklace nickel night note notebook number nut onion orange order owner
pack package packet page painting pair pancake parent part party passenger patient peach pear pebble pen pencil penguin
penny people pepper person pet petal phone photo picture pie piece pig pill pillow pizza place plank plant plate player
point portion poster potato present prize problem product program project pumpkin pupil puppy quarter question rabbit
rat ring rock roll room rose round row run sandwich score seashell seat seed sentence serving set share sheep sheet
shell shirt shoe shot skip slice snack snake sock song spider spot square stamp star stem step stick sticker stock stone
store story straw strawberry student subscriber sweater table task teacher team ticket tile time toddler token tomato
tooth topping towel toy train tree trip truck turkey turtle unit vehicle visitor vote wall watermelon wheel whale win
window wolf woman word worker worm zebra
"""
_IRREGULAR = {
    "calf": "calves", "child": "children", "deer": "deer", "fish": "fish", "goose": "geese", "leaf": "leaves",
    "loaf": "loaves", "man": "men", "mouse": "mice", "people": "people", "person": "persons", "sheep": "sheep",
    "tooth": "teeth", "wolf": "wolves", "woman": "women",
}  # fmt: skip


def _plural(noun: str) -> str:
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh", "ato")) else "s")


def _units() -> dict[str, str]:
    table = {name: nouns for nouns in _COUNTED.split() for name in (nouns, _plural(nouns))}
    table["people"] = table["persons"] = "person"
    for line in _MEASURES.strip().splitlines():
        table.update(dict.fromkeys(line.split(), line.split()[0]))
    return table


#: Name → the unit's one name.
UNITS = _units()
#: What may also follow "/" or "per": "s" alone is none ("1990s").
UNITS_BELOW = {**UNITS, "s": "sec"}
ANGLES = _DEGREES
