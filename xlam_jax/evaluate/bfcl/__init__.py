"""What the suite `bfcl` needs of the Berkeley Function Calling Leaderboard: data, checkers, ways of asking."""
