"""The words and services that every folder shares. Imports none of the project's other folders."""
