"""Print the oldest release of each required dependency of the installed package, but torch's: that is asked for."""

from importlib.metadata import requires

for requirement in requires("analytic-precond") or ():
    if "extra ==" not in requirement and not requirement.startswith("torch"):
        print(requirement.replace(">=", "=="))
