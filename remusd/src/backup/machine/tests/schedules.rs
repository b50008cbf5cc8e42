//! Random schedules.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Step {
    Epoch { armed: bool, cut: usize, damaged: bool },
    Other(usize),
    Alive,
    Drain,
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (any::<bool>(), prop_oneof![5 => Just(4usize), 1 => 0usize..4], prop::bool::weighted(0.03))
            .prop_map(|(armed, cut, damaged)| Step::Epoch { armed, cut, damaged }),
        6 => Just(Step::Alive),
        3 => Just(Step::Drain),
        1 => (0..events().len()).prop_map(Step::Other),
    ]
}

/// What the world saw, to be held against the rules.
#[derive(Default)]
struct World {
    fed: Vec<u64>,
    marked: Vec<u64>,
    acked: Option<u64>,
    sent_whole: Vec<u64>,
    first_armed: Option<u64>,
    frozen: bool,
    destroyed: bool,
    checking: Option<Epoch>,
}

impl World {
    fn see(&mut self, actions: &Actions) {
        for action in actions {
            match action {
                Action::FeedPages(batch) => {
                    assert!(!self.frozen && !self.destroyed, "fed after the end");
                    self.fed.push(batch.entries[0]);
                }
                Action::FeedMark(epoch) => self.marked.push(epoch.0),
                Action::CheckAlive(epoch) => self.checking = Some(*epoch),
                Action::Send(Frame::Ack { epoch, .. }) => {
                    assert!(!self.frozen, "F9: acknowledged after the claim began");
                    assert!(!self.destroyed, "acknowledged what is being destroyed");
                    assert!(self.sent_whole.contains(&epoch.0), "acknowledged an epoch that is not whole");
                    assert!(self.marked.contains(&epoch.0), "acknowledged an epoch that was not fed");
                    assert!(self.acked.is_none_or(|acked| acked < epoch.0), "acknowledged backwards");
                    self.acked = Some(epoch.0);
                }
                Action::FinishCopy { epoch, state } => {
                    assert!(!self.frozen && !self.destroyed);
                    self.frozen = true;
                    assert!(
                        self.first_armed.is_some_and(|first| first <= epoch.0),
                        "R4: activated before it was armed"
                    );
                    assert!(self.acked.is_none_or(|acked| acked <= epoch.0), "R1: an acknowledged epoch is lost");
                    assert_eq!(self.marked.last(), Some(&epoch.0), "another epoch than was fed last");
                    assert_eq!(state[0].body, part(epoch.0).data, "state of another epoch");
                    self.check_fed(Some(epoch.0));
                }
                Action::DestroyCopy => {
                    assert!(!self.destroyed, "destroyed twice");
                    self.destroyed = true;
                }
                Action::FeedHead { .. }
                | Action::Send(_)
                | Action::CloseLink
                | Action::StartGrace
                | Action::CheckLan
                | Action::SaveToken { .. }
                | Action::Claim(_)
                | Action::Force(_)
                | Action::ConfirmClaim(_)
                | Action::Activate(_)
                | Action::ForceActive
                | Action::Forfeit(_)
                | Action::WatchRecord(_)
                | Action::Go
                | Action::Refuse(_)
                | Action::Report(_) => {}
            }
        }
    }

    /// From the first armed epoch on, exactly the whole epochs are fed, each once, in order, ending with `last`.
    fn check_fed(&self, last: Option<u64>) {
        let Some(first) = self.first_armed else { return };
        let armed: Vec<_> = self.fed.iter().copied().filter(|epoch| *epoch > first).collect();
        let whole: Vec<_> = self.marked.iter().copied().filter(|epoch| *epoch > first).collect();
        assert_eq!(armed, whole, "R2: something else than whole epochs was fed");
        if let Some(last) = last {
            assert_eq!(self.marked.last(), Some(&last));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn random_schedules_keep_the_rules(
        steps in prop::collection::vec(any_step(), 1..60),
        witness in any::<bool>(),
        activate in any::<bool>(),
    ) {
        let loss = if activate { OnPrimaryLoss::Activate } else { OnPrimaryLoss::Wait };
        let mut machine = Machine::new(policy(witness, loss));
        let mut world = World::default();
        run(&mut machine, head());
        if witness {
            agree(&mut machine, 1, Token::Witness(key()));
        }
        let mut next = 0;
        let mut armed_yet = false;
        for step in steps {
            let mut happened = Vec::new();
            match step {
                Step::Epoch { armed, cut, damaged } => {
                    armed_yet |= armed;
                    let open = matches!(machine.state(), State::Syncing | State::Armed);
                    let mut events = frames(next, armed_yet);
                    if damaged && cut == 4 {
                        let bad = EpochEnd { bytes: 1, ..end(next, armed_yet) };
                        events[3] = Event::Frame(Frame::EpochEnd(bad));
                    } else if cut == 4 && open {
                        world.sent_whole.push(next);
                        if armed_yet {
                            world.first_armed.get_or_insert(next);
                        }
                    }
                    next += 1;
                    happened.extend(events.into_iter().take(cut));
                }
                Step::Alive => happened.extend(world.checking.take().map(Event::Alive)),
                Step::Drain => happened.extend(world.marked.last().map(|epoch| Event::Drained(Epoch(*epoch)))),
                Step::Other(index) => happened.push(events()[index].1.clone()),
            }
            for event in happened {
                // A frame of the table is of epochs that this schedule does not have.
                if let Event::Frame(Frame::EpochBegin { epoch, .. } | Frame::Pages { epoch, .. }) = &event
                    && epoch.0 + 1 != next
                {
                    continue;
                }
                if let Event::Alive(epoch) = &event
                    && !world.marked.contains(&epoch.0)
                {
                    continue;
                }
                let actions = machine.step(event);
                world.see(&actions);
            }
            world.check_fed(None);
        }
    }
}
