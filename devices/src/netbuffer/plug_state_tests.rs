//! The order of requests, alone and against the model of the kernel's counters.

use proptest::prelude::*;

use super::super::plug_model::PlugModel;
use super::*;

fn armed() -> PlugState {
    let mut state = PlugState::default();
    state.arm().unwrap();
    state
}

fn closed(epoch: u64) -> PlugState {
    let mut state = armed();
    assert_eq!(state.close(epoch), Ok(Some(PlugOp::Buffer)));
    state.outcome(Outcome::Done);
    state
}

#[test]
fn buffer_never_before_release() {
    let mut state = closed(1);
    assert!(state.close(2).is_err());
    assert!(state.release(2).is_err(), "another epoch's");
    assert_eq!(state.release(1), Ok(PlugOp::ReleaseOne));
    assert!(state.close(2).is_err(), "RELEASE_ONE is not answered yet");
    state.outcome(Outcome::Done);
    assert!(state.release(1).is_err(), "once");
    assert_eq!(state.close(2), Ok(Some(PlugOp::Buffer)));
    assert!(state.release(2).is_err(), "BUFFER is not answered yet");
}

#[test]
fn epochs_only_grow() {
    let mut state = closed(5);
    state.release(5).unwrap();
    state.outcome(Outcome::Done);
    assert!(state.close(5).is_err() && state.close(4).is_err());
    assert!(state.close(9).is_ok());
}

#[test]
fn unarmed_buffers_nothing_and_arms_once() {
    let mut state = PlugState::default();
    assert!(state.close(1).is_err() && state.release(1).is_err());
    assert!(state.abandon(1).is_ok());
    state.arm().unwrap();
    assert!(state.arm().is_err());
}

#[test]
fn a_failed_release_is_never_followed_by_buffer() {
    for outcome in [Outcome::Refused, Outcome::Unknown] {
        let mut state = closed(1);
        state.release(1).unwrap();
        state.outcome(outcome);
        assert_eq!(state.phase(), Phase::Broken { epoch: 1 });
        assert!(state.close(2).is_err() && state.release(1).is_err());
        assert!(state.abandon(1).is_err());
        state.give_up();
        assert_eq!(state.replaced(), None);
        assert!(state.close(2).is_err(), "also after a replacement");
        assert_eq!(state.flow(), PlugOp::ReleaseIndefinite);
        assert_eq!(state.replaced(), Some(PlugOp::ReleaseIndefinite));
    }
}

#[test]
fn a_refused_buffer_may_be_tried_for_a_later_epoch_an_unknown_one_not() {
    let mut state = armed();
    state.close(1).unwrap();
    state.outcome(Outcome::Refused);
    state.abandon(1).unwrap();
    assert_eq!(state.close(2), Ok(Some(PlugOp::Buffer)));
    state.outcome(Outcome::Unknown);
    assert!(state.close(3).is_err());
}

#[test]
fn an_abandoned_epoch_goes_with_the_next_and_sends_no_buffer() {
    let mut state = closed(1);
    assert!(state.abandon(7).is_err(), "not the closed one");
    state.abandon(1).unwrap();
    assert!(state.release(1).is_err());
    assert_eq!(state.close(2), Ok(None));
    assert!(state.release(1).is_err());
    assert_eq!(state.release(2), Ok(PlugOp::ReleaseOne));
}

/// What the world does between two suspends.
#[derive(Debug, Clone)]
enum Event {
    /// The guest sends this many packets.
    Send(usize),
    /// The epoch ends: suspend, capture.
    Suspend,
    /// The backup acknowledges, if an epoch waits for it.
    Ack,
    /// The epoch is given up, if one waits.
    Abandon,
    /// Somebody resets the qdisc; it is noticed and replaced before anything else is sent.
    Reset,
    /// The device takes at most this many packets.
    Transmit(usize),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    proptest::collection::vec(
        prop_oneof![
            4 => (0usize..8).prop_map(Event::Send),
            3 => Just(Event::Suspend),
            3 => Just(Event::Ack),
            1 => Just(Event::Abandon),
            1 => Just(Event::Reset),
            3 => (0usize..12).prop_map(Event::Transmit),
        ],
        0..120,
    )
}

/// A guest whose packets carry the epoch they were sent in, behind a plug that is driven by `PlugState`.
struct World {
    state: PlugState,
    plug: PlugModel<(u64, usize)>,
    epoch: u64,
    waiting: Option<u64>,
    acknowledged: u64,
    sent: usize,
    seen: Vec<(u64, usize)>,
    lost: usize,
}

impl World {
    fn new() -> Self {
        Self {
            state: armed(),
            plug: PlugModel::new(u32::MAX),
            epoch: 1,
            waiting: None,
            acknowledged: 0,
            sent: 0,
            seen: Vec::new(),
            lost: 0,
        }
    }

    fn ask(&mut self, op: Option<PlugOp>) {
        if let Some(op) = op {
            self.plug.apply(op);
            self.state.outcome(Outcome::Done);
        }
    }

    fn transmit(&mut self, n: usize) {
        for _ in 0..n {
            let Some(packet) = self.plug.dequeue() else {
                break;
            };
            assert!(packet.0 <= self.acknowledged, "{packet:?} out, acknowledged {}", self.acknowledged);
            self.seen.push(packet);
        }
    }

    fn happen(&mut self, event: &Event) {
        match event {
            Event::Send(n) => {
                for _ in 0..*n {
                    assert!(self.plug.enqueue((self.epoch, self.sent), 1));
                    self.sent += 1;
                }
            }
            Event::Suspend if self.waiting.is_none() => {
                let op = self.state.close(self.epoch).unwrap();
                self.ask(op);
                self.waiting = Some(self.epoch);
                self.epoch += 1;
            }
            // A daemon that would not wait for the acknowledgement is stopped, and nothing is sent.
            Event::Suspend => assert!(self.state.close(self.epoch).is_err()),
            Event::Ack => {
                if let Some(epoch) = self.waiting.take() {
                    self.acknowledged = epoch;
                    let op = self.state.release(epoch).unwrap();
                    self.ask(Some(op));
                }
            }
            Event::Abandon => {
                if let Some(epoch) = self.waiting.take() {
                    self.state.abandon(epoch).unwrap();
                }
            }
            Event::Reset => {
                self.lost += self.plug.len();
                self.plug = PlugModel::new(u32::MAX);
                assert_eq!(self.state.replaced(), None);
            }
            Event::Transmit(n) => self.transmit(*n),
        }
    }

    /// Two full epochs flush whatever an abandoned one left behind.
    fn settle(&mut self) {
        for event in [Event::Ack, Event::Suspend, Event::Ack, Event::Suspend, Event::Ack, Event::Transmit(usize::MAX)] {
            self.happen(&event);
        }
    }
}

proptest! {
    #[test]
    fn only_acknowledged_output_leaves_in_order_and_all_of_it(events in events()) {
        let mut world = World::new();
        for event in &events {
            world.happen(event);
        }
        world.settle();
        prop_assert!(world.seen.windows(2).all(|w| w[0].1 < w[1].1), "order");
        prop_assert_eq!(world.seen.len() + world.lost, world.sent);
        prop_assert!(world.plug.is_empty());
    }

    #[test]
    fn without_faults_exactly_the_acknowledged_epochs_are_out(sizes in proptest::collection::vec(0usize..9, 1..40)) {
        let mut world = World::new();
        for n in sizes {
            world.happen(&Event::Send(n));
            let before = world.sent;
            world.happen(&Event::Suspend);
            world.happen(&Event::Send(3));
            world.happen(&Event::Ack);
            world.happen(&Event::Transmit(usize::MAX));
            prop_assert_eq!(world.seen.len(), before);
        }
    }

    /// The model does leak when the alternation is broken: the property above can fail.
    #[test]
    fn without_the_alternation_it_leaks(first in 1usize..9, second in 1usize..9) {
        let mut plug = PlugModel::new(u32::MAX);
        for _ in 0..first { plug.enqueue(1, 1); }
        plug.apply(PlugOp::Buffer);
        for _ in 0..second { plug.enqueue(2, 1); }
        plug.apply(PlugOp::Buffer);
        plug.apply(PlugOp::ReleaseOne);
        let out = plug.drain();
        prop_assert_eq!(out.len(), second);
        prop_assert_eq!(out.contains(&2), second > first);
    }
}
