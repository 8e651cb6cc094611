"""What the suite `bfcl` needs of the Berkeley Function Calling Leaderboard: its data, its checkers, its way of asking."""
