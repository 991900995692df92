"""This library in other people's models, a module for each package that made them.

None is imported with the library, and none but `transformers` needs the package that it is for.
"""
