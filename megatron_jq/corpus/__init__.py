"""F3: text to pretrain on, in Megatron's indexed .bin and .idx files: writing them, and rows out of them."""
