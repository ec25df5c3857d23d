"""What tests and benches share; benches import nothing else of the tests."""
