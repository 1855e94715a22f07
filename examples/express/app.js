// An Express application behind authsvc and nginx. It serves only users who are signed in, and greets them by email.
//   npm ci && node app.js        (on http://127.0.0.1:8000, the address in deploy/nginx.conf)
"use strict";

const express = require("express");

const app = express();

app.use((request, response, next) => {
  // nginx always replaces this header. A request without it did not come through nginx.
  request.user = request.get("Remote-User");
  if (request.user) next();
  else response.sendStatus(403);
});

app.get("/", (request, response) => {
  response.type("text").send(`Hello ${request.user}. Account and sign-out: https://auth.example.com/account\n`);
});

// Listen on this machine only: a client that bypasses nginx could send any user's name.
app.listen(process.env.PORT ?? 8000, "127.0.0.1");
