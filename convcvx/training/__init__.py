"""The main path: images → patch embedding → problem → solver ⇄ oracle → certificate, and run folders."""
