"""What the test files share: `commands` (and trainings), `data` sets, `problems`, `rows` and `batches` for oracles."""
