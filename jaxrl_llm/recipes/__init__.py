"""Recipes: whole runs from a Config. The only place with loops, printing, files and command lines.

Each module is one algorithm: its docstring says what it does and gives the command, `Config` its settings, and
`run(config)` reads top to bottom.
"""
