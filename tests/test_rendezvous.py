"""Processes meet, and each hears the same about who is missing or differs."""

import concurrent.futures
import json
import socket
import time

import pytest
from processes import free_port

from phpjax import rendezvous
from phpjax.errors import UserError
from phpjax.rendezvous import Member


def member(process, **facts):
  return Member(process, f"host{process}", {"seed": 0, **facts})


def meet(*members, count=None, timeout_s=10.0, port=None):
  """What each of the members, at work at once, gets: the hosts, or the text of its error."""
  address = f"localhost:{port or free_port()}"

  def run(one):
    try:
      return rendezvous.meet(address, one, count or len(members), timeout_s)
    except UserError as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor() as pool:
    return list(pool.map(run, members))


def test_all_there():
  assert meet(member(0), member(1), member(2)) == [["host0", "host1", "host2"]] * 3


def test_the_missing_one_is_named_to_all():
  said = meet(member(0), member(2), count=4, timeout_s=1.0)
  assert said[0] == said[1]
  assert said[0].startswith("process 1, process 3 of 4 did not come to localhost:")
  assert "within 1 s; there are process 0 (host0), process 2 (host2)" in said[0]


def test_without_process_0():
  [said] = meet(member(1), count=2, timeout_s=0.5)
  assert said.startswith("process 1 (host1) found no process 0 at localhost:") and "within 0.5 s" in said


def test_who_differs_and_in_what():
  said = meet(member(0), member(1), member(2, seed=1, extra=[1]))
  assert len(set(said)) == 1
  assert said[0].startswith("process 2 (host2) differs from process 0 (host0): extra ([1], there None), seed (1, there 0)")


def test_two_with_one_number():
  said = meet(member(0), member(1), Member(1, "other", {"seed": 0}), count=3, timeout_s=3.0)
  assert "two are process 1, on " in said[0] and "host1" in said[0] and "other" in said[0]


def test_one_that_ended_while_it_waited_is_missing_and_may_come_again():
  port = free_port()

  def come_and_go():
    for _ in range(100):
      try:
        with socket.create_connection(("localhost", port)) as connection:
          connection.sendall(json.dumps({"process": 1, "host": "gone", "facts": {"seed": 0}}).encode() + b"\n")
          time.sleep(0.3)
          return
      except OSError:
        time.sleep(0.05)

  with concurrent.futures.ThreadPoolExecutor() as pool:
    pool.submit(come_and_go)
    [said] = meet(member(0), count=3, timeout_s=2.5, port=port)
    assert said.startswith("process 1, process 2 of 3 did not come")
    pool.submit(come_and_go)
    late = pool.submit(lambda: [time.sleep(1.5), meet(member(1), member(2), count=3, port=port)][1])
    assert meet(member(0), count=3, port=port) == [["host0", "host1", "host2"]]
    assert late.result() == [["host0", "host1", "host2"]] * 2


@pytest.mark.parametrize(
  "text", [b"GET / HTTP/1.1\r\n\r\n", b"\x80\x04", b"[1]\n", b'{"process": "1"}\n', b"", b"[" * 100000 + b"\n"]
)
def test_strangers_are_sent_away(text):
  port = free_port()

  def disturb():
    for _ in range(200):
      try:
        with socket.create_connection(("localhost", port)) as connection:
          connection.sendall(text)
          connection.shutdown(socket.SHUT_WR)
          return connection.recv(10)
      except ConnectionResetError:
        return b""
      except OSError:
        time.sleep(0.02)

  with concurrent.futures.ThreadPoolExecutor() as pool:
    answer = pool.submit(disturb)
    first = pool.submit(meet, member(0), count=2, port=port)
    assert answer.result() == b""
    assert meet(member(1), count=2, port=port) == [["host0", "host1"]] == first.result()


@pytest.mark.parametrize("address", ["localhost", "localhost:", "localhost:0", ":1", "localhost:x", "localhost:70000"])
def test_what_is_no_address(address):
  with pytest.raises(UserError, match="is not HOST:PORT"):
    rendezvous.split(address)


def test_a_port_that_is_taken():
  with socket.create_server(("", 0)) as taken:
    [said] = meet(member(0), count=2, port=taken.getsockname()[1])
  assert "cannot listen at port" in said and "--coordinator_address" in said
