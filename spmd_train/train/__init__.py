"""The program that trains, the loop around it, evaluation and generation."""
