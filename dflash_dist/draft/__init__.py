"""The draft as pure tensor mathematics.

It knows neither data files nor the target nor ranks. Shape letters: B rows, S packed length, L captured layers,
H hidden, A anchors a row, K block size, V vocabulary, D head size.
"""
