from dpo_service.cli import main

main()
