// An Express application behind authsvc and nginx, which lets nobody through who is not signed in, and says who it is.
//   npm ci && node app.js        (on http://127.0.0.1:8000, where deploy/nginx.conf looks for it)
"use strict";

const express = require("express");

const app = express();

app.use((request, response, next) => {
  // nginx replaces what a client sends under this name; without it, the request did not come through nginx.
  request.user = request.get("Remote-User");
  if (request.user) next();
  else response.sendStatus(403);
});

app.get("/", (request, response) => {
  response.type("text").send(`Hello ${request.user}. Account and sign-out: https://auth.example.com/account\n`);
});

// This machine only: who reaches the application past nginx can claim to be anybody.
app.listen(process.env.PORT ?? 8000, "127.0.0.1");
