// The shim for forward auth, in PocketBase's own JavaScript: a proxy cannot read the user in the body of an answer.
routerAdd(
  "GET",
  "/verify",
  (event) => {
    event.response.header().set("Remote-User", event.auth.email());
    return event.noContent(204);
  },
  $apis.requireAuth("users"),
);
