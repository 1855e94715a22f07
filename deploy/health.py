"""The health check of the container: ends with 0 if the service answers GET /health with 200, and with 1 otherwise."""

import http.client
import sys

service = http.client.HTTPConnection("127.0.0.1", 5000, timeout=4)
service.request("GET", "/health")
sys.exit(service.getresponse().status != 200)
