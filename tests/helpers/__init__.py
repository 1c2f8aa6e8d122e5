"""What the test files share: `commands` (the command line, trainings), `problems` (small ones), `rows` (of oracles)."""
