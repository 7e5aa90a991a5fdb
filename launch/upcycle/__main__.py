"""Makes models of trained ones: a mixture of experts, one expert more or less, low-rank factors, or merged adapters.

  espalier upcycle --method=bam --experts runs/seed runs/code runs/law --to=runs/bam
  espalier upcycle extend --moe=runs/nexus --add code=runs/code --domains=domains.json --to=runs/nexus5
  espalier upcycle factorise --checkpoint=/tmp/espalier_tiny --to=/tmp/factors --rank=0.5
  espalier upcycle merge --checkpoint=/tmp/lora --to=/tmp/merged

`espalier upcycle --help` shows the flags that make a mixture, and `espalier upcycle NAME --help`
those of `extend`, `factorise` and `merge`.
"""

from espalier.launch import cli

COMMANDS = cli.sub_commands("upcycle")

if __name__ == "__main__":
    raise SystemExit(cli.subcommand(__doc__, COMMANDS, default="espalier.launch.upcycle.upcycle"))
