#!/usr/bin/env bash
# Sends a request to every route of the API with curl and two cookie jars; stops at the first unexpected response:
#   AUTHSVC_SESSIONS_PER_USER=2 make run &  examples/api.sh [URL]
# It creates an account and deletes it at the end. Its passwords are public. Put yours into a file or a pipe
# (curl --data-urlencode password@file), because every user of a machine can read command lines.
set -euo pipefail

url=${1:-http://127.0.0.1:5000}
email=walk-$$-$RANDOM@example.com
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
jar=$folder/here other=$folder/there

ask() { # status method path [field=value …]: sends a request and stores the response in $body
    local expected=$1 method=$2 path=$3 status fields=()
    shift 3
    for field in "$@"; do fields+=(--data-urlencode "$field"); done
    status=$(curl -s -o "$folder/body" -w '%{http_code}' -b "$jar" -c "$jar" -X "$method" "${fields[@]}" "$url$path") || {
        echo "api.sh: nothing answers at $url" >&2
        exit 1
    }
    body=$(cat "$folder/body")
    if [ "$status" != "$expected" ]; then
        echo "api.sh: $method $path: expected $expected, got $status $body" >&2
        exit 1
    fi
    echo "$status $method $path"
}

value() { # name: prints the field of this name in $body
    python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1" <<<"$body"
}

code() { # seed [offset]: prints the one-time code (RFC 6238) of the current time step, or of a later one
    python3 - "$1" "$(($(date +%s) / 30 + ${2:-0}))" <<'PYTHON'
import base64, hmac, sys
digest = hmac.digest(base64.b32decode(sys.argv[1]), int(sys.argv[2]).to_bytes(8, "big"), "sha1")
print(f"{(int.from_bytes(digest[(at := digest[-1] & 15):at + 4], 'big') & 0x7FFFFFFF) % 1_000_000:06}")
PYTHON
}

# The service
ask 200 GET /
ask 200 GET /health
ask 200 GET /metrics
ask 302 GET /.well-known/change-password

# An account and a session
ask 200 POST /users "email=$email" password="tarte flambée"
ask 400 POST /users "email=$email" password="tarte flambée"
ask 401 POST /sessions "email=$email" password=wrong
ask 200 POST /sessions "email=$email" password="tarte flambée"
ask 200 GET /profile
ask 200 GET /verify

# A second session, which the first one ends
here=$jar jar=$other
ask 200 POST /sessions "email=$email" password="tarte flambée"
jar=$here
curl -s -f -o "$folder/body" -b "$jar" "$url/profile" || {
    echo "api.sh: the first session has ended: start the service with AUTHSVC_SESSIONS_PER_USER=2 or more" >&2
    exit 1
}
ask 200 GET /sessions
id=$(python3 -c 'import json, sys
print(next(one["id"] for one in json.load(sys.stdin)["sessions"] if not one["current"]))' <<<"$body")
ask 200 DELETE "/sessions/$id"
ask 404 DELETE "/sessions/$id"
ask 200 DELETE /sessions/others
jar=$other
ask 401 GET /verify
ask 302 GET "/verify?login=1"
jar=$here

# An access token, with which a program passes /verify
ask 200 POST /tokens password="tarte flambée" name=git days=30
token=$(value token) id=$(value id)
ask 200 GET /tokens
curl -s -f -o "$folder/body" -u "$email:$token" "$url/verify" || {
    echo "api.sh: GET /verify: the access token is refused" >&2
    exit 1
}
ask 200 DELETE "/tokens/$id"
ask 404 DELETE "/tokens/$id"

# Passkeys. Only a browser can make one, so what curl sends in its place is refused
ask 200 POST /passkeys/options password="tarte flambée"
ask 400 POST /passkeys name=laptop credential=none
ask 200 GET /passkeys
ask 404 DELETE /passkeys/1 password="tarte flambée"
ask 200 POST /sessions/passkey/options
ask 400 POST /sessions/passkey credential=none

# Two-factor authentication
ask 200 POST /totp password="tarte flambée"
seed=$(value secret)
ask 200 PUT /totp "otp=$(code "$seed")"
recovery=$(python3 -c 'import json, sys; print(json.load(sys.stdin)["recovery_codes"][0])' <<<"$body")
ask 302 DELETE /sessions
ask 401 POST /sessions "email=$email" password="tarte flambée"
ask 200 POST /sessions "email=$email" password="tarte flambée" "otp=$(code "$seed" 1)" # the next code: each works once
ask 200 DELETE /totp password="tarte flambée" "otp=$recovery"

# Change the email; only a development service without a mail server returns the token
ask 200 POST /email password="tarte flambée" "new_email=new-$email"
token=$(value token)
ask 403 PUT /email "email=$email" "token=$token"
ask 200 PUT /email "email=new-$email" "token=$token"
email=new-$email
ask 403 PUT /users "email=$email" "token=$token" password=bretzel # of a registration, where emails are confirmed

# Change the password, then reset it; only a development service returns the token
ask 403 PUT /password password=wrong new_password=choucroute
ask 200 PUT /password password="tarte flambée" new_password=choucroute
ask 200 POST /reset_password "email=$email"
token=$(value reset_token)
ask 200 PUT /reset_password "email=$email" "reset_token=$token" new_password=bretzel
ask 403 PUT /reset_password "email=$email" "reset_token=$token" new_password=bretzel
ask 403 GET /profile

# Sign out everywhere and delete the account
ask 200 POST /sessions "email=$email" password=bretzel
ask 200 DELETE /sessions/all
ask 200 POST /sessions "email=$email" password=bretzel
ask 200 DELETE /profile password=bretzel
ask 401 POST /sessions "email=$email" password=bretzel
