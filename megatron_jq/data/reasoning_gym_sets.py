"""F2: which sets of reasoning-gym suit a likelihood of the gold answer, one row each, and why the others are refused.

A set is in SETS after 500 of its items were looked at in CHECKED_VERSION: a gold answer of one line and at most
LONGEST_ANSWER characters, of which there is one way to write it; the same items in two processes with different
PYTHONHASHSEED, and whatever the number of items. Most golds were worked out again, without the package.
"""

from dataclasses import dataclass

CHECKED_VERSION = "0.1.25"
LONGEST_ANSWER = 128  # characters


@dataclass(frozen=True)
class GymSet:
    """One set that can be used, with its default settings. answers: shortest/median/longest gold in characters.

    numbers: every gold is a number, and answers are compared as numbers. recomputed: golds that were worked out again
    (of 500), none of which was wrong; 0: none was. commonest: share of the gold answer that occurs most, which is what
    a policy gets that ignores the question. note: what else to know, or nothing. open: regular expression of questions
    that have no one answer; they are left out.
    """

    name: str
    what: str
    numbers: bool
    answers: str
    recomputed: int
    commonest: float
    note: str = ""
    open: str = ""


_ROWS = (
    GymSet("gcd", "the greatest common divisor of two numbers", True, "1/1/3", 500, 0.33),
    GymSet("letter_counting", "how often a letter stands in a text", True, "1/1/2", 500, 0.37),
    GymSet("chain_sum", "a sum with + and -", True, "1/3/6", 500, 0.02),
    GymSet(
        "simple_equations", "the unknown of a linear equation", True, "1/2/3", 499, 0.02,
        "one question in some 1,200 is 0 = 0", r"0 = 0$",
    ),
    GymSet("leg_counting", "legs of several animals, by the package's own table", True, "2/3/3", 500, 0.01),
    GymSet("lcm", "the least common multiple of two numbers", True, "1/3/4", 500, 0.02),
    GymSet("count_primes", "how many primes are between two numbers", True, "1/3/4", 500, 0.01),
    GymSet("products", "the product of two numbers", True, "1/6/10", 500, 0.04, "34 of 500 questions twice"),
    GymSet("count_bits", "ones in a number's binary form", True, "1/2/2", 500, 0.16),
    GymSet("maze", "length of the shortest way through a maze", True, "1/1/2", 500, 0.31),
    GymSet("rotten_oranges", "minutes until a grid is infected", True, "1/1/2", 500, 0.36),
    GymSet("binary_alternation", "swaps until a binary string alternates", True, "1/1/2", 500, 0.19),
    GymSet("gsm_symbolic", "word problems in the manner of GSM8K", True, "1/2/7", 0, 0.02),
    GymSet("aiw", "how many siblings, friends or colleagues", True, "1/1/1", 0, 0.18, "6 answers"),
    GymSet("base_conversion", "a number in another base", False, "1/3/10", 500, 0.01),
    GymSet("bitwise_arithmetic", "hexadecimal arithmetic with shifts", False, "5/7/18", 500, 0.01),
    GymSet("spell_backward", "a word from its end", False, "3/8/10", 500, 0.01),
    GymSet("word_sequence_reversal", "a list of words from its end", False, "9/33/74", 500, 0.01),
    GymSet("string_insertion", "letters inserted by rules", False, "5/12/21", 500, 0.01),
    GymSet("calendar_arithmetic", "dates and weekdays", False, "1/3/9", 0, 0.10, "some answers are Yes or No"),
    GymSet("family_relationships", "how two people are related", False, "3/7/13", 0, 0.13, "12 answers"),
)  # fmt: skip
#: Name → row.
SETS = {row.name: row for row in _ROWS}

_NO_GOLD = "its items have no gold answer"
_HASH_SEED = "its items differ from process to process (they depend on PYTHONHASHSEED)"
_SEVERAL = "many answers are right, and its gold is one of them"
_FORMS = "its gold can be written in several ways"
_LISTS = "its answers are lists, JSON or code, which can be written in several ways"
_LINES = f"its answers have several lines or more than {LONGEST_ANSWER} characters"
_TWO = "its answers are Yes/No or True/False, so that a guess is right half of the time and nothing starts cold"
_UNCHECKED = "nobody has checked that its golds are right and that only one text is"

#: Name → why it is refused.
REFUSED = {
    "syllogism": "one gold in eight is wrong (134 of 1000)",
    "basic_arithmetic": "golds with / are floor divisions (13 of 1000 wrong); chain_sum and products are like it",
    "acre": "item i depends on the number of items",
    "ab": "some of its gold answers are empty",
    "caesar_cipher": f"some of its answers have more than {LONGEST_ANSWER} characters",
    "number_sequence": "several rules may fit, and some items do not end (item 163 of the package's seed 0)",
    "game_of_life_halting": _TWO,
    **dict.fromkeys(
        ("boxnet", "composite", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"), _NO_GOLD
    ),
    **dict.fromkeys(
        ("isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder"), _HASH_SEED
    ),
    **dict.fromkeys(
        ("countdown", "jugs", "letter_jumble", "n_queens", "palindrome_generation", "path_star", "puzzle24",
         "quantum_lock", "sentence_reordering", "shortest_path", "sokoban"),
        _SEVERAL,
    ),
    **dict.fromkeys(
        ("advanced_geometry", "coin_flip", "complex_arithmetic", "decimal_arithmetic", "decimal_chain_sum", "dice",
         "fraction_simplification", "intermediate_integration", "polynomial_equations", "power_function",
         "simple_integration"),
        _FORMS,
    ),
    **dict.fromkeys(
        ("codeio", "game_of_life", "group_anagrams", "list_functions", "number_filtering", "number_sorting",
         "palindrome_partitioning"),
        _LISTS,
    ),
    **dict.fromkeys(
        ("arc_agi", "binary_matrix", "futoshiki", "kakurasu", "manipulate_matrix", "mini_sudoku", "modulo_grid",
         "pool_matrix", "rearc", "rotate_matrix", "spiral_matrix", "sudoku", "survo", "tower_of_hanoi"),
        _LINES,
    ),
    **dict.fromkeys(("circuit_logic", "course_schedule"), _TWO),
    **dict.fromkeys(
        ("arc_1d", "bf", "color_cube_rotation", "cryptarithm", "emoji_mystery", "figlet_font", "knights_knaves",
         "largest_island", "mahjong_puzzle", "needle_haystack", "number_format", "prime_factorization",
         "rectangle_count", "self_reference", "simple_geometry", "string_manipulation", "string_splitting",
         "string_synthesis", "time_intervals", "tsumego", "word_sorting", "zebra_puzzles"),
        _UNCHECKED,
    ),
}  # fmt: skip
