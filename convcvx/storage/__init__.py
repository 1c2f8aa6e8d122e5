"""Files and folders that survive kills: written whole, locked, exchanged, read strictly."""
