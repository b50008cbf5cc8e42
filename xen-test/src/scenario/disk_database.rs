//! A file system and a database under power loss: what a client was told is there, and nothing that it could not have been told.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use xen_test_guest::protocol::LedgerInfo;
use xen_test_guest::xl::{GuestSpec, Kind};

use super::{Ctx, Scenario};
use crate::client::{Control, LedgerClient};
use crate::host::{Host, Snapshot};
use crate::protection::disks::{BACKING, DISK, create, disk};
use crate::protection::{Guest, PATIENCE, Protected, at, domains, fail_over, protect, start_daemons, wait_epochs};
use crate::wait::wait_until;

pub(super) const DATABASE: Scenario = Scenario {
    name: "disk-database",
    about: "the primary loses power under a guest's ext4 with SQLite: fsck is clean, all acknowledged transactions are there, no later ones",
    hosts: 2,
    start: Snapshot::Ready,
    run,
};

/// A copy of the disk as a power loss of the second host, too, would leave it.
const CRASHED: &str = "/var/lib/remus/crashed.img";

/// Another SQLite than the guest's looks at a file system in a file: integrity, entries, the newest, the sum of all accounts.
const LOOK: &str = "
import sqlite3
d = sqlite3.connect('/mnt/ledger.db')
one = lambda q: d.execute(q).fetchone()[0]
print(one('pragma integrity_check'), one('select count(*) from entry'), one('select max(n) from entry'), one('select sum(total) from account'))
d.close()
";

fn run(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let (a, b) = (pair.a(), pair.b());
    start_daemons(pair)?;
    create(b, false)?;
    create(a, true)?;
    a.sh(&format!("mke2fs -q -t ext4 /dev/remus/{DISK} && blockdev --flushbufs /dev/remus/{DISK}"))?;
    // A later power loss takes back what was not synced of the hosts' own files.
    pair.each(|host| host.sh("sync").map(drop))?;
    let disks = vec![format!("phy:/dev/remus/{DISK},xvda,w")];
    let guest = Guest::create(pair, a, GuestSpec { disks, ..GuestSpec::new(Kind::Pvh) })?;
    let protected = Protected::of(guest)?;
    let guest = &protected.guest;
    sound(guest.ask(|c| c.ledger_open("/dev/xvda"))?)?;
    let to = at(guest.spec.ip, guest.ports().ledger);
    let client = pair.client_ns().call(move || LedgerClient::connect(to, 1, PATIENCE))??;
    more(&client, 10)?;

    protect(a, "guest", "")?;
    ensure!(disk(a)?.in_sync, "protected, and the copies of the disk are not alike");
    wait_epochs(a, "guest", 6)?;
    more(&client, 5)?;
    a.power_off();
    let known = client.acknowledged();
    ctx.note(&format!("{known} transactions are acknowledged; the primary has lost its power"));
    let failover = fail_over(b, guest, &protected.client, Instant::now())?;
    ctx.note(&format!("first byte after {} ms", failover.first_byte.as_millis()));

    b.sh(&format!("xl pause guest && sync && cp --sparse=always {BACKING} {CRASHED}; xl unpause guest"))?;
    // As a boot does: the journal is played back (exit code 1), and then nothing must be left to mend.
    b.sh(&format!("e2fsck -fp {CRASHED}; [ $? -le 1 ]"))?;
    let (crashed, _) = look(b, CRASHED)?;
    ensure!(
        crashed >= known,
        "{known} transactions were acknowledged, and after a second power loss {crashed} are there"
    );

    let live = sound(guest.ask(Control::ledger_check)?)?;
    ensure!(live.committed >= known, "{known} transactions were acknowledged, and the guest knows of {live:?}");
    more(&client, 10)?;
    protected.goes_on()?;
    let acknowledged = client.finish(PATIENCE).map_err(|why| anyhow::anyhow!("the ledger's client: {why}"))?;
    let last = sound(guest.ask(Control::ledger_close)?)?;
    ensure!(last.committed == acknowledged, "the client was told of {acknowledged} transactions: {last:?}");
    guest.ask(Control::poweroff)?;
    wait_until(PATIENCE, "the guest powers off", || Ok(domains(b)?.is_empty().then_some(())))?;
    b.sh("sync")?;
    let (there, newest) = look(b, BACKING)?;
    ensure!(
        (there, newest) == (acknowledged, acknowledged),
        "{acknowledged} transactions were acknowledged, the disk has {there}, the newest is {newest}"
    );
    ctx.note(&format!(
        "all {acknowledged} transactions are there, {known} of them from before the power loss; fsck is clean"
    ));
    Ok(())
}

/// Waits until the client was told of so many entries more.
fn more(client: &LedgerClient, count: u64) -> Result<()> {
    let from = client.acknowledged();
    client
        .wait_for(from + count, PATIENCE)
        .map(drop)
        .with_context(|| format!("no {count} entries after {from}; the connection: {:?}", client.ended()))
}

fn sound(info: LedgerInfo) -> Result<LedgerInfo> {
    ensure!(info.is_sound(), "the ledger is not whole: {info:?}");
    Ok(info)
}

/// Has e2fsck find nothing, and another SQLite read the database: entries, and the newest one's number.
fn look(host: &Host, image: &str) -> Result<(u64, u64)> {
    let said = host.sh(&format!(
        "e2fsck -fn {image} >&2 && mount -o loop {image} /mnt && {{ python3 -c \"{LOOK}\"; rc=$?; umount /mnt; exit $rc; }}"
    ))?;
    let words: Vec<&str> = said.split_whitespace().collect();
    let ["ok", entries, newest, "0"] = words[..] else {
        anyhow::bail!("the database in {image}: {said}");
    };
    Ok((entries.parse()?, newest.parse()?))
}
