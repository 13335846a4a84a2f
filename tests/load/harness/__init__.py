"""`pagoda load`: a client like any other that sends requests at a pace of its own and says how they fared.

It knows the contract and the client, and nothing of the services: what holds for ours holds for an OpenAI server.
"""
