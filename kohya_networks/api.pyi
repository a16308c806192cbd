# For type checkers, which do not follow the folder of the modules.
from networks.api import AppliedNetwork as AppliedNetwork
from networks.api import Plan as Plan
from networks.api import apply as apply
from networks.api import load as load
from networks.api import merge as merge
from networks.api import plan as plan
from networks.api import save as save
