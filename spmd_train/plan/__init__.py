"""What a program will need and how fast it can run, told by the compilers of hardware not here."""
