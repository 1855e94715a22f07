// Make bench.db in the current folder, with so many users: node fill.js USERS
import { getMigrations } from "better-auth/db/migration";
import { auth } from "./auth.js";

const PASSWORD = "correct horse battery staple";

const { runMigrations } = await getMigrations(auth.options);
await runMigrations();
const context = await auth.$context;
const hashed = await context.password.hash(PASSWORD);
const now = new Date().toISOString(); // as it writes dates in SQLite
const db = auth.options.database;
db.pragma("cache_size = -400000"); // KB: its ids are random, and all over the indexes
const addUser = db.prepare(
  "INSERT INTO user (id, name, email, emailVerified, createdAt, updatedAt) VALUES (?, ?, ?, 0, ?, ?)",
);
const addAccount = db.prepare(
  `INSERT INTO account (id, accountId, providerId, userId, password, createdAt, updatedAt)
   VALUES (?, ?, 'credential', ?, ?, ?, ?)`,
);
db.transaction((users) => {
  for (let number = 0; number < users; number += 1) {
    const id = context.generateId({ model: "user" });
    addUser.run(id, `user${number}`, `user${number}@example.com`, now, now);
    addAccount.run(context.generateId({ model: "account" }), id, id, hashed, now, now);
  }
})(Number(process.argv[2]));
db.close();
