"""What XLA will do with a program: its shardings, collectives and memory."""
