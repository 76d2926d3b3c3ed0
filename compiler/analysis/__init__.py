"""What passes may ask of a program. Nothing here changes one."""
