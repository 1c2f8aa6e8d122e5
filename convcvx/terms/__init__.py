"""Words that options take and commands end with. None of them needs torch, which takes seconds to import."""
