"""How results are shown to people: figures, pictures, words, and the HTML of notebooks; the report is made of these.

matplotlib and Jinja are imported on use only: `figures`, `theme` and `html` wait until something is drawn.
"""
