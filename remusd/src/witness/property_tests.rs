//! Two hosts, a witness and a network that loses, delays and reorders: at no time do two hosts run the guest alone, and when the
//! network is well again exactly one does. Then the witness is rolled back and wiped: who remembers more is never served.

use proptest::prelude::*;

use super::client::{CasReply, Client, Effect, Input, Outcome, ReadError, RequestId};
use super::memory::Table;
use super::record::{Record, RecordKey, RecordState as S, Versioned, Watermark};
use super::rules::{Intent, Refusal};
use super::rules_tests::{DOMAIN, attempt, host, nonce};
use crate::ids::Generation;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Role {
    /// Runs the guest, was never protected.
    Fresh,
    /// Has the original, under protection or sealed; output goes out only with the backup's acknowledgement.
    Primary,
    /// Has a copy.
    Backup,
    /// Runs the guest, output flows.
    Alone,
    /// Lost; its copy is kept until the winner is active.
    Frozen,
    /// Claimed or may have, its copy is proven gone.
    Failed,
    /// Has nothing.
    Gone,
}

struct Side {
    client: Client,
    durable: Watermark,
    role: Role,
    /// As saved with the token.
    key: Option<RecordKey>,
    intent: Option<Intent>,
    waiting: Option<RequestId>,
    life: u32,
}

enum Call {
    Read(RequestId),
    Cas(RequestId, Box<Versioned>, Box<Record>),
}

struct Flight {
    side: usize,
    life: u32,
    call: Call,
    reply: Option<Input>,
    /// The caller has been told that nothing is known.
    late: bool,
}

struct World {
    table: Table,
    past: Vec<Table>,
    sides: [Side; 2],
    flights: Vec<Flight>,
    counter: u128,
    armed_once: bool,
}

#[derive(Clone, Debug)]
enum Op {
    Begin(usize, u8),
    Serve(usize),
    Deliver(usize),
    TimeOut(usize),
    Lose(usize),
    Wake(usize),
    Cancel(usize),
    Crash(usize, bool),
}

fn op() -> impl Strategy<Value = Op> {
    let side = 0..2usize;
    let n = 0..64usize;
    prop_oneof![
        4 => (side.clone(), any::<u8>()).prop_map(|(s, w)| Op::Begin(s, w)),
        6 => n.clone().prop_map(Op::Serve),
        6 => n.clone().prop_map(Op::Deliver),
        2 => n.clone().prop_map(Op::TimeOut),
        1 => n.prop_map(Op::Lose),
        2 => side.clone().prop_map(Op::Wake),
        1 => side.clone().prop_map(Op::Cancel),
        1 => (side, any::<bool>()).prop_map(|(s, b)| Op::Crash(s, b)),
    ]
}

impl World {
    fn new() -> Self {
        let side = |n: usize, role| Side {
            client: Client::new(host(n as u128 + 1, ["a", "b"][n]), DOMAIN, Watermark::default()),
            durable: Watermark::default(),
            role,
            key: None,
            intent: None,
            waiting: None,
            life: 0,
        };
        let sides = [side(0, Role::Fresh), side(1, Role::Gone)];
        Self { table: Table::new("t"), past: vec![], sides, flights: vec![], counter: 100, armed_once: false }
    }

    fn fresh(&mut self) -> u128 {
        self.counter += 1;
        self.counter
    }

    fn arm(&mut self, s: usize) -> Intent {
        let n = self.fresh();
        let peer = self.sides[1 - s].client.me().clone();
        let peer_has_seen = self.sides[1 - s].durable.key.is_some();
        Intent::Arm { at_least: Generation(1), nonce: nonce(n), peer, peer_has_seen }
    }

    /// What this side's driver might want now.
    fn wish(&mut self, s: usize, what: u8) -> Option<Intent> {
        let pick = |of: &[fn(RecordKey) -> Intent], key| of[usize::from(what) % of.len()](key);
        match (self.sides[s].role, self.sides[s].key) {
            (Role::Fresh, _) => Some(self.arm(s)),
            (Role::Primary, Some(_)) if what.is_multiple_of(5) => Some(self.arm(s)),
            (Role::Primary, Some(key)) => {
                Some(pick(&[Intent::Claim, Intent::Claim, Intent::Stop, Intent::HandOver], key))
            }
            (Role::Backup, Some(key)) => Some(Intent::Claim(key)),
            (Role::Alone, Some(key)) if what.is_multiple_of(2) => Some(Intent::Activate(key)),
            (Role::Alone, _) => Some(self.arm(s)),
            (Role::Frozen, _) => Some(Intent::Look),
            (Role::Failed, Some(key)) => Some(Intent::Forfeit(key)),
            _ => None,
        }
    }

    fn begin(&mut self, s: usize, intent: Option<Intent>) {
        let Some(intent) = intent else { return };
        let n = self.fresh();
        if let Ok(effects) = self.sides[s].client.start(intent.clone(), attempt(n)) {
            self.sides[s].intent = Some(intent);
            self.carry_out(s, effects);
        }
    }

    fn carry_out(&mut self, side: usize, effects: Vec<Effect>) {
        for effect in effects {
            let life = self.sides[side].life;
            let call = match effect {
                Effect::Read(r) => Call::Read(r),
                Effect::Cas { request, expected, new } => Call::Cas(request, expected, new),
                Effect::Wait { request, .. } => {
                    self.sides[side].waiting = Some(request);
                    continue;
                }
                Effect::SaveWatermark(w) => {
                    self.sides[side].durable = w;
                    continue;
                }
                Effect::Alarm(text) => panic!("the witness is well, and: {text}"),
                Effect::Done(outcome) => {
                    self.done(side, outcome);
                    continue;
                }
            };
            self.flights.push(Flight { side, life, call, reply: None, late: false });
        }
    }

    fn alone(&mut self, s: usize) {
        assert_ne!(self.sides[1 - s].role, Role::Alone, "two live copies");
        self.sides[s].role = Role::Alone;
    }

    fn done(&mut self, s: usize, outcome: Outcome) {
        let intent = self.sides[s].intent.take().expect("only what was begun ends");
        let role = self.sides[s].role;
        match (intent, outcome) {
            (Intent::Arm { .. }, Outcome::Won(r)) => {
                assert_ne!(self.sides[1 - s].role, Role::Alone, "armed what another host runs");
                self.armed_once = true;
                self.sides[s].role = Role::Primary;
                self.sides[s].key = Some(r.key());
                // A new session: the other host gets a new copy, and the key.
                self.cancel(1 - s);
                self.sides[1 - s].role = Role::Backup;
                self.sides[1 - s].key = Some(r.key());
            }
            (Intent::Claim(_), Outcome::Won(r)) => {
                self.sides[s].key = Some(r.key());
                if role == Role::Backup && self.counter.is_multiple_of(3) {
                    self.sides[s].role = Role::Failed;
                } else {
                    self.alone(s);
                }
            }
            (Intent::Stop(_), Outcome::Won(_)) => self.alone(s),
            (Intent::Forfeit(_), Outcome::Won(_) | Outcome::Lost(_)) => self.sides[s].role = Role::Gone,
            (Intent::Forfeit(_), Outcome::Refused(_)) => self.sides[s].role = Role::Gone,
            (Intent::Activate(_) | Intent::HandOver(_), Outcome::Won(_)) => {}
            (Intent::Look, Outcome::Seen(r)) if !r.owner.is(self.sides[s].client.me()) => match r.state {
                S::Active | S::Stopped => self.sides[s].role = Role::Gone,
                S::Forfeited => {
                    self.sides[s].role = Role::Primary;
                    self.sides[s].key = Some(r.key());
                }
                // Armed for us anew, or handed over: a new session's affair.
                S::Armed | S::HandedTo | S::Claimed => {}
            },
            (_, Outcome::Lost(_)) => match role {
                Role::Primary => self.sides[s].role = Role::Frozen,
                Role::Backup => self.sides[s].role = Role::Gone,
                other => panic!("{other:?} lost to another host"),
            },
            (_, Outcome::Refused(Refusal::WrongState(_))) => {}
            (intent, outcome) => panic!("{role:?} {intent:?} {outcome:?}"),
        }
    }

    /// Whether a change had been sent.
    fn cancel(&mut self, s: usize) -> bool {
        self.sides[s].intent = None;
        self.sides[s].client.cancel().is_some_and(|d| d.sent)
    }

    fn crash(&mut self, s: usize, guest_lives: bool) {
        let side = &mut self.sides[s];
        side.life += 1;
        side.intent = None;
        side.client = Client::new(side.client.me().clone(), DOMAIN, side.durable.clone());
        side.role = match side.role {
            Role::Alone if !guest_lives => Role::Primary, // sealed until it has claimed
            Role::Backup => Role::Failed,
            role => role,
        };
    }

    fn serve(&mut self, n: usize) {
        let Flight { call, reply, .. } = &mut self.flights[n];
        *reply = Some(match call {
            Call::Read(r) => Input::Read(*r, Ok(self.table.read(DOMAIN))),
            Call::Cas(r, expected, new) => {
                let before = self.table.clone();
                let applied = self.table.cas(DOMAIN, expected, new);
                if applied.is_some() {
                    self.past.push(before);
                }
                Input::Cas(*r, applied.map_or(CasReply::Conflict, CasReply::Applied))
            }
        });
    }

    fn tell(&mut self, side: usize, life: u32, input: Input) {
        if self.sides[side].life == life {
            let effects = self.sides[side].client.on(input);
            self.carry_out(side, effects);
        }
    }

    fn unknown(&mut self, n: usize) {
        let flight = &mut self.flights[n];
        flight.late = true;
        let (side, life) = (flight.side, flight.life);
        let input = match &flight.call {
            Call::Read(r) => Input::Read(*r, Err(ReadError::Unavailable("lost".into()))),
            Call::Cas(r, ..) => Input::Cas(*r, CasReply::Unknown("lost".into())),
        };
        self.tell(side, life, input);
    }

    fn apply(&mut self, op: &Op) {
        let one_of = |n: usize, len: usize| (len > 0).then(|| n % len);
        match *op {
            Op::Begin(s, what) => {
                let wish = self.wish(s, what);
                self.begin(s, wish);
            }
            Op::Serve(n) => {
                let open: Vec<_> = (0..self.flights.len()).filter(|i| self.flights[*i].reply.is_none()).collect();
                if let Some(i) = one_of(n, open.len()) {
                    self.serve(open[i]);
                }
            }
            Op::Deliver(n) => {
                let open: Vec<_> = (0..self.flights.len()).filter(|i| self.flights[*i].reply.is_some()).collect();
                if let Some(i) = one_of(n, open.len()) {
                    let flight = self.flights.remove(open[i]);
                    if !flight.late {
                        self.tell(flight.side, flight.life, flight.reply.expect("served"));
                    }
                }
            }
            Op::TimeOut(n) => {
                if let Some(i) = one_of(n, self.flights.len()) {
                    self.unknown(i);
                }
            }
            Op::Lose(n) => {
                if let Some(i) = one_of(n, self.flights.len()) {
                    self.unknown(i);
                    self.flights.remove(i);
                }
            }
            Op::Wake(s) => {
                if let Some(r) = self.sides[s].waiting.take() {
                    let life = self.sides[s].life;
                    self.tell(s, life, Input::Retry(r));
                }
            }
            Op::Cancel(s) => {
                let claims = self.sides[s].role == Role::Backup;
                if self.cancel(s) && claims {
                    self.sides[s].role = Role::Failed; // discards its copy; the claim may have been won
                }
            }
            Op::Crash(s, guest_lives) => self.crash(s, guest_lives),
        }
    }

    /// The network is well again: everything in flight arrives, every intent settles.
    fn settle(&mut self) {
        for _ in 0..200 {
            for s in 0..2 {
                self.apply(&Op::Wake(s));
            }
            if self.flights.is_empty() && self.sides.iter().all(|s| s.intent.is_none()) {
                return;
            }
            for _ in 0..self.flights.len() {
                self.apply(&Op::Serve(0));
                self.apply(&Op::Deliver(0));
            }
        }
        panic!("an intent never settled");
    }

    /// Everybody does what there is to do.
    fn converge(&mut self) {
        self.settle();
        for _ in 0..8 {
            for s in [0, 1] {
                let wish = match (self.sides[s].role, self.sides[s].key) {
                    (Role::Primary, Some(key)) => Some(Intent::Claim(key)),
                    (Role::Alone, Some(key)) => Some(Intent::Activate(key)),
                    (Role::Frozen | Role::Failed, _) => self.wish(s, 0),
                    _ => None,
                };
                self.begin(s, wish);
                self.settle();
            }
        }
    }
}

fn run(ops: &[Op]) -> World {
    let mut world = World::new();
    for op in ops {
        world.apply(op);
    }
    world.converge();
    world
}

/// `PROPTEST_CASES=100000` for a long run.
fn config() -> ProptestConfig {
    let config = ProptestConfig::default();
    ProptestConfig { cases: config.cases.max(400), max_shrink_iters: 20_000, failure_persistence: None, ..config }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn never_two_copies_and_in_the_end_exactly_one(ops in prop::collection::vec(op(), 1..120)) {
        let world = run(&ops);
        if world.armed_once {
            let roles = [world.sides[0].role, world.sides[1].role];
            let alone = roles.iter().filter(|r| **r == Role::Alone).count();
            prop_assert_eq!(alone, 1, "{:?} {}", roles, world.table.read(DOMAIN).record.unwrap());
        }
    }

    #[test]
    fn who_remembers_more_than_the_witness_is_never_served(ops in prop::collection::vec(op(), 1..80)) {
        let mut world = run(&ops);
        let mut older = std::mem::take(&mut world.past);
        let mut wiped = world.table.clone();
        wiped.wipe();
        older.push(wiped);
        for s in 0..2 {
            let (Some(key), Some(position)) = (world.sides[s].durable.key, world.sides[s].durable.position.clone()) else {
                continue;
            };
            for table in &older {
                if table.position(0).revision >= position.revision {
                    continue; // not older to this host
                }
                let mut intents = vec![world.arm(s), Intent::Look];
                for make in [Intent::Accept, Intent::Claim, Intent::Activate, Intent::Forfeit, Intent::Stop, Intent::HandOver] {
                    intents.push(make(key));
                }
                for intent in intents {
                    let n = world.fresh();
                    let mut client = Client::new(world.sides[s].client.me().clone(), DOMAIN, world.sides[s].durable.clone());
                    let [Effect::Read(r)] = client.start(intent, attempt(n)).unwrap()[..] else { unreachable!() };
                    let effects = client.on(Input::Read(r, Ok(table.read(DOMAIN))));
                    prop_assert!(matches!(effects[0], Effect::Alarm(_)), "{:?}", effects);
                    prop_assert!(matches!(effects.last(), Some(Effect::Done(Outcome::Refused(_)))), "{:?}", effects);
                }
            }
        }
    }
}
