"""A model, a data set and an optimizer of your own: copy this folder and change what you need.

`config.py` uses all three. Nothing is registered: a config names each class by import string, and Python finds it in
the folder where you type the command, or among the installed packages.
"""
