"""Texts for `lexigraft demo`: prose that this package carries, disease names that others ship.

Sources and licences: SOURCES.md in this folder.
"""
