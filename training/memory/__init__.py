"""What is kept where, how many bytes that takes, and which memory settings fit."""
