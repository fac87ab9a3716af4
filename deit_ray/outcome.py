"""How a run or trial can end."""
