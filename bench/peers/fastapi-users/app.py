"""The "full example" of FastAPI Users: SQLAlchemy with aiosqlite, JWT as bearer."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated
from uuid import UUID

from fastapi import Depends, FastAPI, Response
from fastapi_users import BaseUserManager, FastAPIUsers, UUIDIDMixin, schemas
from fastapi_users.authentication import AuthenticationBackend, BearerTransport, JWTStrategy
from fastapi_users.db import SQLAlchemyBaseUserTableUUID, SQLAlchemyUserDatabase
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase

# Not the "SECRET" of the example, of whose length PyJWT warns; fixed, for both workers need the same.
SECRET = "the benchmark's, and no secret, but long enough"


class Base(DeclarativeBase):
    """The base of the tables."""


class User(SQLAlchemyBaseUserTableUUID, Base):
    """A user."""


class UserRead(schemas.BaseUser[UUID]):
    """What is told of a user."""


class UserUpdate(schemas.BaseUserUpdate):
    """What may be changed of a user."""


engine = create_async_engine("sqlite+aiosqlite:///./bench.db")
async_session_maker = async_sessionmaker(engine, expire_on_commit=False)


async def create_db_and_tables() -> None:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)


async def get_async_session() -> AsyncGenerator[AsyncSession, None]:
    async with async_session_maker() as session:
        yield session


async def get_user_db(session: Annotated[AsyncSession, Depends(get_async_session)]):
    yield SQLAlchemyUserDatabase(session, User)


class UserManager(UUIDIDMixin, BaseUserManager[User, UUID]):
    """What is done with users."""

    reset_password_token_secret = SECRET
    verification_token_secret = SECRET


async def get_user_manager(user_db: Annotated[SQLAlchemyUserDatabase, Depends(get_user_db)]):
    yield UserManager(user_db)


def get_jwt_strategy() -> JWTStrategy:
    return JWTStrategy(secret=SECRET, lifetime_seconds=3600)


auth_backend = AuthenticationBackend(
    name="jwt", transport=BearerTransport(tokenUrl="auth/jwt/login"), get_strategy=get_jwt_strategy
)
fastapi_users = FastAPIUsers[User, UUID](get_user_manager, [auth_backend])


@asynccontextmanager
async def lifespan(_: FastAPI):
    await create_db_and_tables()
    yield


# Less the routers that the benchmark does not call: to register, verify and reset.
app = FastAPI(lifespan=lifespan)
app.include_router(fastapi_users.get_auth_router(auth_backend), prefix="/auth/jwt", tags=["auth"])
app.include_router(fastapi_users.get_users_router(UserRead, UserUpdate), prefix="/users", tags=["users"])


@app.get("/verify", status_code=204)
async def verify(user: Annotated[User, Depends(fastapi_users.current_user(active=True))], response: Response) -> None:
    """Tell a proxy who is signed in."""
    response.headers["Remote-User"] = user.email
