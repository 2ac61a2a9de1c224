"""STAND-IN: the network that is being defined."""

import tensorrt as trt


class Network:
    def __init__(self):
        self.trt_network = trt.Network()
        self.arrays = []

    def register_ndarray(self, array):
        self.arrays.append(array)


_network = Network()


def default_net():
    return _network


def default_trtnet():
    return _network.trt_network
