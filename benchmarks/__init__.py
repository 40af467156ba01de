"""Speed, memory and efficiency tables. Not built yet."""
