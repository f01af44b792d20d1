"""The embedded default: a student, a teacher, a feature network and reference statistics of 32x32
digits.
"""
