"""Mutation of passes: which changes of its source does the proof kit notice?"""
