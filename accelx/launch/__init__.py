"""How the ranks of one machine are planned, started, watched and ended."""
