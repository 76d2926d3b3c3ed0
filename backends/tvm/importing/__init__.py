"""From a program to a Relax module."""
