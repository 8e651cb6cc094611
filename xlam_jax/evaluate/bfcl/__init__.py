"""Data, checkers and prompts of the Berkeley Function Calling Leaderboard, for the suite `bfcl`."""
