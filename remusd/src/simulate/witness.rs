//! The witness, its faults, and one protection's way to it: the real client around the real table, with requests that are late, lost or
//! answered too late.

use super::daemon::{GUEST, host};
use super::plan::{HostIx, MS, Micros};
use super::world::{Event, Input, World};
use crate::ids::{Generation, Nonce};
use crate::witness::memory::Table;
use crate::witness::probe::remember;
use crate::witness::{
    Attempt, CasReply, Client, Effect, Input as Reply, Intent, Outcome, Position, ReadError, Record, RecordKey,
    RecordState, RequestId, Versioned,
};

/// How long an answer is waited for.
const TIMEOUT: Micros = 60 * MS;
/// How long a call may take before its caller is told that nothing is known.
const LIMIT: Micros = 150 * MS;
/// Between looks at the witness's health.
const PROBE: Micros = 40 * MS;

enum Request {
    Read,
    Cas(Box<Versioned>, Box<Record>),
}

struct Exchange {
    host: HostIx,
    incarnation: u32,
    keeper: u64,
    id: RequestId,
    request: Request,
    reply: Option<Reply>,
    answered: bool,
}

/// The witness.
pub struct Witness {
    /// What it holds.
    pub table: Table,
    backup: Table,
    /// Faults that keep everybody from it.
    pub down: u32,
    /// Faults that keep this host from it.
    pub away: [u32; 2],
    /// Requests arrive so much later.
    pub slow: Micros,
    /// So many replies to swaps are lost.
    pub lose: u32,
    /// It was wiped or rolled back: what it says may be anything.
    pub spoiled: bool,
    /// When it was last not well, as seen from this host.
    pub trouble: [Micros; 2],
    exchanges: Vec<Exchange>,
}

impl Default for Witness {
    fn default() -> Self {
        let table = Table::new("witness");
        Self {
            backup: table.clone(),
            table,
            down: 0,
            away: [0; 2],
            slow: 0,
            lose: 0,
            spoiled: false,
            trouble: [0; 2],
            exchanges: Vec::new(),
        }
    }
}

/// What a call is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Arm the record; this arming.
    Arm(u64),
    /// Claim it.
    Claim,
    /// Claim it whatever it says.
    Force,
    /// Note that we run the guest.
    Activate,
    /// Record the stop.
    Stop,
    /// Record the hand-over.
    Hand,
    /// Watch what the other does.
    Watch,
    /// Read it once more.
    Confirm,
    /// Give a claim up.
    Forfeit,
    /// Remember it.
    Accept,
}

/// What a call has come to.
#[derive(Clone, Debug)]
pub enum Word {
    /// Won.
    Won(RecordKey),
    /// Another has it; how it stands.
    Lost(Box<Record>),
    /// Refused; why.
    Refused(String),
    /// Looked at.
    Seen(Box<Record>),
    /// Nothing is known yet.
    Unknown,
}

/// One protection's way to the witness, on one side.
#[derive(Debug)]
pub struct Keeper {
    /// Which one.
    pub id: u64,
    client: Client,
    purpose: Option<Call>,
    serial: u64,
    told: bool,
    intent: Option<Intent>,
}

impl Keeper {
    /// With what this host remembers.
    pub fn new(world: &mut World, at: HostIx) -> Self {
        let watermark = world.hosts[at].disk.watermark.clone();
        let client = Client::new(host(at), GUEST, watermark);
        Self { id: world.number(), client, purpose: None, serial: 0, told: false, intent: None }
    }

    /// Whether a call of this kind is under way.
    #[must_use]
    pub fn is_busy_with(&self, purpose: Call) -> bool {
        self.purpose == Some(purpose)
    }

    /// Asks; a call under way is given up.
    pub fn ask(&mut self, world: &mut World, at: HostIx, purpose: Call, intent: Intent) -> Option<(Call, Word)> {
        self.client.cancel();
        self.purpose = Some(purpose);
        self.told = false;
        self.intent = Some(intent.clone());
        self.serial = world.number();
        world.note(|_| format!("host {at}: witness <- {purpose:?}"));
        world.later(at, LIMIT, Input::KeeperLimit(self.id, self.serial));
        if let Some(seen) = world.hosts[at].daemon.as_ref().and_then(|daemon| daemon.seen.as_ref()) {
            self.client.observed(seen);
        }
        let attempt = Attempt(uuid::Uuid::from_u64_pair(world.number(), 3));
        let effects = self.client.start(intent, attempt).unwrap_or_default();
        self.carry_out(world, at, effects)
    }

    fn carry_out(&mut self, world: &mut World, at: HostIx, effects: Vec<Effect>) -> Option<(Call, Word)> {
        for effect in effects {
            match effect {
                Effect::Read(id) => world.witness_send(at, self.id, id, Request::Read),
                Effect::Cas { request, expected, new } => {
                    world.witness_send(at, self.id, request, Request::Cas(expected, new));
                }
                Effect::Wait { request, .. } => {
                    let wait = world.takes(25 * MS);
                    world.later(at, wait, Input::KeeperRetry(self.id, request.0));
                }
                Effect::SaveWatermark(watermark) => world.hosts[at].disk.watermark = watermark,
                Effect::Alarm(_) => {}
                Effect::Done(outcome) => {
                    let word = match outcome {
                        Outcome::Won(record) => Word::Won(record.key()),
                        Outcome::Lost(record) => Word::Lost(record),
                        Outcome::Seen(record) => Word::Seen(record),
                        Outcome::Refused(refusal) => Word::Refused(refusal.to_string()),
                    };
                    world.note(|_| format!("host {at}: witness says {word:?}"));
                    return Some((self.purpose.take()?, word));
                }
            }
        }
        None
    }

    /// An answer to the exchange of this number.
    pub fn answer(&mut self, world: &mut World, at: HostIx, exchange: usize) -> Option<(Call, Word)> {
        let reply = world.witness.exchanges[exchange].reply.take()?;
        let effects = self.client.on(reply);
        self.carry_out(world, at, effects)
    }

    /// A wait is over.
    pub fn retry(&mut self, world: &mut World, at: HostIx, request: u64) -> Option<(Call, Word)> {
        let effects = self.client.on(Reply::Retry(RequestId(request)));
        self.carry_out(world, at, effects)
    }

    /// The caller's patience is over.
    pub fn limit(&mut self, serial: u64) -> Option<(Call, Word)> {
        if self.serial != serial || self.told {
            return None;
        }
        self.told = true;
        Some((self.purpose?, Word::Unknown))
    }
}

/// Arms the record for the other host.
pub fn arm(world: &mut World, at: HostIx) -> Intent {
    let peer_has_seen = world.hosts[1 - at].disk.watermark.key.is_some();
    let nonce = Nonce(uuid::Uuid::from_u64_pair(world.number(), 4));
    Intent::Arm { at_least: Generation(1), nonce, peer: host(1 - at), peer_has_seen }
}

/// Claims the record on an operator's word.
pub fn force(world: &mut World, at: HostIx) -> Intent {
    Intent::Force { nonce: Nonce(uuid::Uuid::from_u64_pair(world.number(), 5)), peer: host(1 - at) }
}

/// What a loser who watches makes of the record: `Some(true)` when the other runs the guest, `Some(false)` when it may be claimed.
#[must_use]
pub fn watched(record: &Record, at: HostIx) -> Option<bool> {
    let me = host(at);
    match record.state {
        _ if record.owner.is(&me) => Some(false),
        RecordState::Active | RecordState::Stopped => Some(true),
        RecordState::Forfeited | RecordState::HandedTo if record.peer.is(&me) => Some(false),
        _ => None,
    }
}

impl World {
    fn witness_send(&mut self, host: HostIx, keeper: u64, id: RequestId, request: Request) {
        let incarnation = self.hosts[host].incarnation;
        let exchange = Exchange { host, incarnation, keeper, id, request, reply: None, answered: false };
        self.witness.exchanges.push(exchange);
        let number = self.witness.exchanges.len() - 1;
        let arrives = self.takes(800) + self.witness.slow;
        if self.witness_well(host) {
            self.after(arrives, Event::Witness(number));
        }
        self.after(TIMEOUT, Event::WitnessTimeout(number));
    }

    /// Whether the witness can be reached from this host.
    #[must_use]
    pub fn witness_well(&self, host: HostIx) -> bool {
        self.witness.down == 0 && self.witness.away[host] == 0
    }

    pub(super) fn witness_arrives(&mut self, number: usize) {
        let Exchange { host, id, request, .. } = &self.witness.exchanges[number];
        let (host, id) = (*host, *id);
        if !self.witness_well(host) {
            return;
        }
        let reply = match request {
            Request::Read => Reply::Read(id, Ok(self.witness.table.read(GUEST))),
            Request::Cas(expected, new) => {
                let swapped = self.witness.table.cas(GUEST, expected, new);
                if let Some(position) = swapped {
                    let text = new.to_string();
                    self.note(|_| format!("witness: {text}"));
                    if self.witness.lose > 0 {
                        self.witness.lose -= 1;
                        return;
                    }
                    Reply::Cas(id, CasReply::Applied(position))
                } else {
                    Reply::Cas(id, CasReply::Conflict)
                }
            }
        };
        self.witness_replies(number, reply, 400);
    }

    pub(super) fn witness_timeout(&mut self, number: usize) {
        let Exchange { id, request, .. } = &self.witness.exchanges[number];
        let reply = match request {
            Request::Read => Reply::Read(*id, Err(ReadError::Unavailable(String::new()))),
            Request::Cas(..) => Reply::Cas(*id, CasReply::Unknown(String::new())),
        };
        self.witness_replies(number, reply, 0);
    }

    fn witness_replies(&mut self, number: usize, reply: Reply, typical: Micros) {
        let time = self.takes(typical);
        let exchange = &mut self.witness.exchanges[number];
        if std::mem::replace(&mut exchange.answered, true) {
            return;
        }
        exchange.reply = Some(reply);
        let (host, incarnation, keeper) = (exchange.host, exchange.incarnation, exchange.keeper);
        self.after(time, Event::Daemon(host, incarnation, Input::Keeper(keeper, number)));
    }

    /// The witness is down for so long.
    pub(super) fn witness_down(&mut self, time: Micros) {
        self.witness.down += 1;
        self.after(time, Event::WitnessHeals(None));
    }

    /// This host cannot reach it for so long.
    pub(super) fn witness_away(&mut self, host: HostIx, time: Micros) {
        self.witness.away[host] += 1;
        self.after(time, Event::WitnessHeals(Some(host)));
    }

    pub(super) fn witness_heals(&mut self, host: Option<HostIx>) {
        match host {
            Some(host) => self.witness.away[host] -= 1,
            None => self.witness.down -= 1,
        }
        self.witness.trouble = [self.now; 2];
    }

    /// It loses everything.
    pub(super) fn witness_wiped(&mut self) {
        self.witness.table.wipe();
        self.witness.spoiled = true;
    }

    /// It is restored from the backup that was taken last. Not while a host that could act on it has seen nothing newer: no watermark can
    /// tell a host what it has never seen, which is why docs/witness.md has protections ended first.
    pub(super) fn witness_rolled_back(&mut self) {
        let backup = self.witness.backup.position(0).revision;
        let knows = |host: &super::world::Host| {
            let newer = |position: Option<&Position>| position.is_some_and(|position| position.revision > backup);
            // What the probe has seen is forgotten with the daemon, and so is the copy that it could claim for.
            let probed = host.daemon.as_ref().filter(|daemon| daemon.incoming.is_some());
            newer(host.disk.watermark.position.as_ref()) || newer(probed.and_then(|daemon| daemon.seen.as_ref()))
        };
        if !self.hosts.iter().all(knows) {
            return self.note(|_| "nobody could tell; not done".into());
        }
        self.witness.table = self.witness.backup.clone();
        self.witness.spoiled = true;
    }

    /// A backup of it is taken.
    pub(super) fn witness_backed_up(&mut self) {
        self.witness.backup = self.witness.table.clone();
    }

    /// Looks how the witness is, as the daemon's probe does: two failures are a loss, one success its end.
    pub(super) fn probe(&mut self, host: HostIx) {
        let well = self.witness_well(host);
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        if well {
            daemon.probe_failures = 0;
            remember(&mut daemon.seen, &self.witness.table.position(0));
        } else {
            daemon.probe_failures += 1;
            self.witness.trouble[host] = self.now;
        }
        let up = daemon.probe_failures < 2;
        let changed = std::mem::replace(&mut daemon.witness_up, up) != up;
        let sealed = daemon.sealed;
        let pause = self.takes(PROBE);
        self.later(host, pause, Input::Probe);
        if !changed {
            return;
        }
        self.note(|_| format!("host {host}: the witness is {}", if up { "up" } else { "down" }));
        self.primary_event(host, |primary, _, _| primary.witness(up));
        if up && sealed {
            self.recover(host, false);
        }
    }

    pub(super) fn keeper_input(&mut self, host: HostIx, input: Input) {
        let (Input::Keeper(id, _) | Input::KeeperRetry(id, _) | Input::KeeperLimit(id, _)) = input else { return };
        let take = move |keeper: &mut Keeper, world: &mut World| match input {
            Input::Keeper(_, exchange) => keeper.answer(world, host, exchange),
            Input::KeeperRetry(_, request) => keeper.retry(world, host, request),
            Input::KeeperLimit(_, serial) => keeper.limit(serial),
            _ => None,
        };
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        if daemon.primary.as_ref().is_some_and(|p| p.keeper.id == id) {
            self.primary_event(host, |primary, world, _| {
                if let Some((purpose, word)) = take(&mut primary.keeper, world) {
                    primary.witness_says(world, host, purpose, word);
                }
            });
        } else if daemon.incoming.as_ref().is_some_and(|i| i.keeper.id == id) {
            self.backup_event(host, |incoming, world, host| match take(&mut incoming.keeper, world) {
                Some((purpose, word)) => incoming.witness_says(world, host, purpose, word),
                None => true,
            });
        } else if daemon.recovery.as_ref().is_some_and(|r| r.keeper.id == id) {
            let Some(mut recovery) = daemon.recovery.take() else { return };
            let word = take(&mut recovery.keeper, self);
            if let Some(daemon) = &mut self.hosts[host].daemon {
                daemon.recovery = Some(recovery);
            }
            if let Some((purpose, word)) = word {
                self.recovery_told(host, purpose, word);
            }
        } else if daemon.janitor.as_ref().is_some_and(|keeper| keeper.id == id) {
            let Some(mut keeper) = daemon.janitor.take() else { return };
            let word = take(&mut keeper, self);
            let unsettled = match word {
                None | Some((_, Word::Unknown)) => true,
                // A claim that nobody can use any more is given up.
                Some((Call::Claim, Word::Won(key))) => {
                    let _ = keeper.ask(self, host, Call::Forfeit, Intent::Forfeit(key));
                    true
                }
                Some(_) => false,
            };
            if let Some(daemon) = self.hosts[host].daemon.as_mut().filter(|_| unsettled) {
                daemon.janitor = Some(keeper);
            } else if let Some(record) = &mut self.hosts[host].disk.incoming {
                record.owed = false;
            }
        }
    }

    /// Whether the witness was well for long, as seen from this host, and still is.
    #[must_use]
    pub fn witness_is_fine(&self, host: HostIx, since: Micros) -> bool {
        !self.witness.spoiled && self.witness_well(host) && self.now > self.witness.trouble[host] + since
    }

    /// Whether the record says that this host may run the guest.
    #[must_use]
    pub fn owns_record(&self, at: HostIx) -> bool {
        let found = self.witness.table.read(GUEST).record;
        found.is_some_and(|record| {
            record.owner.is(&host(at)) && matches!(record.state, RecordState::Claimed | RecordState::Active)
        })
    }
}
