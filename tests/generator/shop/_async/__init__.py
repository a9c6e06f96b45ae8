"""The asyncio classes of the shop."""

from __future__ import annotations

GENERATE = {
    "till": ["AsyncTill", "AsyncDrawer"],
    "back.ledger": ["AsyncLedger"],
}
