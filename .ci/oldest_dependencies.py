"""Print the oldest release of each required dependency of the installed package, ``torch==2.6`` for ``torch>=2.6``."""

from importlib.metadata import requires

for requirement in requires("analytic-precond") or ():
    if "extra ==" not in requirement:
        print(requirement.replace(">=", "=="))
