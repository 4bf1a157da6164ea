"""What the suites of tests share, and nobody else needs; the rest is in scripts/harness/."""
