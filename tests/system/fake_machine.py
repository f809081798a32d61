"""The simulated Firecracker of ``postcopy probe firecracker``, with one more order:

kvm     run a guest of KVM in the memory (see examples/kvm_clones.py); what it has found
"""

from __future__ import annotations

import json
import sys

from examples.kvm_clones import run
from postcopy.firecracker.simulated import Machine, obey

if __name__ == "__main__":
    machine = Machine(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
    obey(machine, {"kvm": lambda: run(machine.memory.address, machine.memory.length)})
