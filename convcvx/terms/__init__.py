"""Words: of options, of what bounds speak of, of how searches and commands end; and texts that are numbers.

None of them needs torch, which takes seconds to import.
"""
