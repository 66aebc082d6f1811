"""Claims that were stated before the runs, and what the result rows say about them."""
