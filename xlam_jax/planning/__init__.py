"""What a step needs of a machine that is not here: compiled for it where a compiler can, computed otherwise."""
